// The library is compiled with hidden visibility; only what is marked here can be seen from outside.
#pragma once

#define LONGVQ_EXPORT extern "C" __attribute__((visibility("default")))
