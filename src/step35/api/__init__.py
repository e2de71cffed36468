"""What crosses folder and process borders: plain records and protocols, no torch."""
