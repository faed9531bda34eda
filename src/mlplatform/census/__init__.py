"""What is told about the census, and is true of no other table."""
