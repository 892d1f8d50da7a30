"""What this project is measured against, one file each."""
