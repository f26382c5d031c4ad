"""What devices say, from the broker into the database. Nothing is believed because of the topic it came on alone."""
