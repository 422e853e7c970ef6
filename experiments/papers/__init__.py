"""What one paper alone needs: its own protocol, metric or report.

* arXiv 2101.12372 (CSA and CSE): cost_sensitive.py is its protocol, metric_i.py its metric, and
  min_max.py its report on a network's weights.
* arXiv 2203.08959 (CLAF): claf_literal.py measures and draws its released code's attack.

No other script needs this folder, but for tables.py, which prints metric I on demand.
"""
