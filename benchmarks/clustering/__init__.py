"""What clustering costs, what each way of clustering keeps, and pictures of the clusters."""
