"""Tree attention that tunes itself to the device it runs on."""
