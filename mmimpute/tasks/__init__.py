"""What a model is asked besides imputation: coherence, sample quality, likelihood, z0 as an embedding, cross-modal retrieval.

Always about people that the member who answers did not learn from. A modality is an N x D matrix here, whatever it holds.
"""
