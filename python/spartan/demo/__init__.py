"""The demonstration behind `spartan demo`: real data, two small models, dense against sparse."""
