"""What each op says of the coordinates that it meets: one small file for each kind of op, one table."""
