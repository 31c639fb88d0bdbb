cd /tmp/wt/mix; export JAX_PLATFORMS=cpu
/tmp/v/py311/bin/python -m pytest -q -x -p no:xdist "$@" 2>&1 | tail -25
