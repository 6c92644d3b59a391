"""The benchmarks, installed with the package: what they measure, how they check and time it, and their result files.

``python -m t2t_fast bench`` runs :mod:`t2t_fast.bench.throughput`; ``python -m t2t_fast.bench.NAME`` runs any of them,
and so do the scripts in ``benchmarks/``. Only the command line imports this package. rich, matplotlib, scikit-learn and
webdataset may be missing: :mod:`t2t_fast.bench.terminal` replaces rich, and the others are imported inside functions.
"""
