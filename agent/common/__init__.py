"""What the device and the fleet server both need of their machine: durable files, and what systemd wants to hear."""
