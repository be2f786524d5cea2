#include "stretches.hpp"

#include <algorithm>

namespace idefics2 {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t most_taps(const Taps& taps, int64_t first, int64_t last) {
    int64_t most = 1;
    for (int64_t output = first; output < last; ++output) most = std::max(most, taps.count(output));
    return most;
}

// How many outputs, in whole stores, may be loaded from where their windows begin.
int64_t safe_outputs(const Taps& taps, int channels) {
    const int64_t last_load = round_up(most_taps(taps, 0, taps.outputs()), kPixelsPerLoad) - kPixelsPerLoad;
    int64_t safe = 0;
    while (safe < taps.outputs() && (taps.first[safe] + last_load) * channels + 16 <= taps.input * channels) ++safe;
    return safe - safe % kOutputsPerStore;
}

void add_window(Stretch& stretch, const Taps& taps, int channels, int64_t output, int64_t start) {
    stretch.offsets.push_back(start * channels - stretch.skipped);
    const size_t begin = stretch.weights.size();
    stretch.weights.resize(begin + stretch.taps);
    std::copy_n(taps.of(output), taps.count(output), stretch.weights.begin() + begin + (taps.first[output] - start));
}

}  // namespace

bool plan_stretches(const Taps& taps, int channels, int64_t granule, Stretches& planned) {
    const int64_t outputs = taps.outputs(), safe = safe_outputs(taps, channels);
    Stretch& start = planned.start;
    start.taps = round_up(most_taps(taps, 0, safe), granule);
    for (int64_t output = 0; output < safe; ++output) add_window(start, taps, channels, output, taps.first[output]);

    Stretch& end = planned.end;
    end.taps = round_up(most_taps(taps, safe, outputs), kPixelsPerLoad);
    end.skipped = 16 - kPixelsPerLoad * channels;
    for (int64_t i = safe; i < round_up(outputs, kOutputsPerStore); ++i) {
        const int64_t output = std::min(i, outputs - 1);
        const int64_t first = std::min(taps.first[output], taps.input - end.taps);
        if (first * channels < end.skipped) return false;
        add_window(end, taps, channels, output, first);
    }
    return true;
}

}  // namespace idefics2
