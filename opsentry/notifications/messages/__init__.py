"""Messages: their content, their texts, and the formats of each channel."""
