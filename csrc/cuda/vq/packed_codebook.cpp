#include "packed_codebook.h"

namespace longvq::cuda {

PackedCodebook::PackedCodebook(const char* op, const Tensor& from, ElementType type, int64_t columns, void* stream) {
  const Tensor values = as_type(from, ScalarType::Float);
  const int64_t heads = values.size(0), num_codes = values.size(1), padded = padded_codes(num_codes);
  const int64_t num_terms = type == ElementType::kFloat ? 3 : 1;
  terms = torch::stable::new_empty(values, {heads, num_terms, padded, columns}, ScalarType::BFloat16);
  half_norms = torch::stable::new_empty(values, {heads, padded}, ScalarType::Float);
  codebook = {heads, num_codes, values.size(2), columns, data_of<uint16_t>(terms), data_of<float>(half_norms)};
  const PackCodebook problem{
      const_data_of<float>(values), values.stride(0), values.stride(1), values.stride(2), type, codebook};
  if (heads > 0) {
    check_launch(op, longvq_cuda_pack_codebook(&problem, stream));
  }
}

}  // namespace longvq::cuda
