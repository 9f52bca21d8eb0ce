// What decides between ways to compute the same beside the instructions that a processor has: how many it carries out at once.

#pragma once

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

#if defined(__x86_64__)
inline bool is_intel() { return __builtin_cpu_is("intel"); }
inline bool is_amd() { return __builtin_cpu_is("amd"); }

// AMD's number of a line of processors: 0x17 for Zen 1 and 2, 0x19 for Zen 3 and 4, 0x1a for Zen 5; 0 for others'.
inline unsigned amd_family() {
    unsigned a = 0, b, c, d;
    if (!is_amd() || !__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const unsigned family = a >> 8 & 0xf;
    return family == 0xf ? family + (a >> 20 & 0xff) : family;
}
#else
inline bool is_intel() { return false; }
inline bool is_amd() { return false; }
inline unsigned amd_family() { return 0; }
#endif

}  // namespace
