"""What users would run instead of our operators, written plainly and not tuned down."""
