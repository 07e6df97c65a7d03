// The library is compiled with hidden visibility; only functions marked with this macro are exported.
#pragma once

#define LONGVQ_EXPORT extern "C" __attribute__((visibility("default")))
