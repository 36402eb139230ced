"""The networks: transformer, text encoder, video autoencoder, and how their weights get in."""
