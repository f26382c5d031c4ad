"""The mosquitto that the server runs: its configuration and its supervision."""
