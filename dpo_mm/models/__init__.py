"""Models on disk and on servers: checks of their files, loading, quantisation, and a client."""
