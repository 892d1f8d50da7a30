"""Steps and clips of the reduced ControlVideo pipeline."""
