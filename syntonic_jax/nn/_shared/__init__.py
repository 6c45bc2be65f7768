"""What the layers of all frameworks share."""
