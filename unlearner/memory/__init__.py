"""How much memory a run needs: estimated by formula and measured by a probe."""
