"""The machine under the agent: durable files, sd_notify, peer credentials, hardware, clock."""
