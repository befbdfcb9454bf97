"""What people look at: pages of HTML with tables, charts and pictures; the analysis behind them."""
