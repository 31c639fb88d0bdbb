"""Datasets made and sifted with models: stages that read JSON lines and write JSON lines (docs/synthesis.md).

config   what a run is asked to do          run      rows in, rows out, gone on with after a kill
stages   what every stage is                asking   chats with a model, many at a time
rows     where a row's instruction stands   prompts  what models are asked with
and the stages: tag, select, evolve, respond, verify_code, write_verifiers, verify_instructions, repurpose
"""
