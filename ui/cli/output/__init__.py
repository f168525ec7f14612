"""How results are printed: tables, figures, gates and written logs."""
