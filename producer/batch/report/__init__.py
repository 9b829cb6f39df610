"""A page about a batch, for people who would rather look. `report` gathers what `page` shows."""
