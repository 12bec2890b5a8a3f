"""What people see: words, figures, pages, cards, comparisons."""
