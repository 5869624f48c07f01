"""Health of the installation and of what is on the disk: doctor, verify, clean."""
