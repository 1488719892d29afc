"""verl's keys, one module for each section of its configuration: names, meanings and conversions."""
