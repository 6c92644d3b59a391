"""The benchmarks, installed with the package: rows to measure, how they are checked and timed, and their result files.

``python -m t2t_fast bench`` is :mod:`t2t_fast.bench.throughput`. The others run as ``python -m t2t_fast.bench.NAME``;
the scripts in ``benchmarks/`` do just that. Only the command line imports this package. rich, matplotlib, scikit-learn
and webdataset may be missing: :mod:`t2t_fast.bench.terminal` does without rich, functions import the others.
"""
