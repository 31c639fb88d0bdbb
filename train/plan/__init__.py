"""`python -m train.plan CONFIG.gin --topology v5e:16x16`: a run planned for TPUs that are not there."""
