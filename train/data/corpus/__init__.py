"""Raw text to a corpus: stages that are functions of one shard, and of small tables of all.

config      what is done: the schema of the .gin files
phases      a config as tasks, and which read what others left
tasks       a task: done once, whoever does it
run         all of them on one machine; `datatrove` on many
documents   shards of documents on disk
filtering   a shard through one of the filters:
read        files, HTML, JSON lines to documents
language    which language
exact, minhash, duplicates   the same text, and nearly the same
rules       the heuristics of Gopher, C4 and FineWeb
quality     points from a Qwen (`judge`)
decontaminate   what evaluation sets hold (`lcs`)
domains     what it is about, and how often it is to be read
publish     what is left, and its tokens
report      what happened
"""
