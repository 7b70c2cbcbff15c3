"""Operations on tensors that the engine and the models share, each held against its definition."""
