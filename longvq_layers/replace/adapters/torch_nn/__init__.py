"""torch.nn.MultiheadAttention, alone or inside nn.TransformerEncoderLayer and nn.TransformerDecoderLayer."""
