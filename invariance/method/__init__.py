"""What a compression method is: the interfaces, the registry, the budget."""
