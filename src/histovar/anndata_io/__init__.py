"""Read, check and write the slots of AnnData; nothing else in the package does."""
