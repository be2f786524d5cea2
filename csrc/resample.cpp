#include "resample.hpp"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cassert>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <stdexcept>

namespace idefics2 {
namespace {

constexpr int32_t kHalf = 1 << (kWeightBits - 1);

uint8_t to_byte(uint32_t sum) { return static_cast<uint8_t>(std::min<uint32_t>(sum >> kWeightBits, 255)); }

class ScalarHorizontal final : public HorizontalPass {
public:
    ScalarHorizontal(const Taps& taps, int channels) : HorizontalPass(1), taps_(taps), channels_(channels) {}

    void run(const uint8_t* const* in, uint8_t* const* out) const override {
        run_row(*in, *out);
    }

private:
    void run_row(const uint8_t* in, uint8_t* out) const {
        for (int64_t x = 0; x < taps_.outputs(); ++x) {
            const uint8_t* pixel = in + taps_.first[x] * channels_;
            const int32_t* weights = taps_.of(x);
            uint32_t red = kHalf, green = kHalf, blue = kHalf;
            for (int64_t tap = 0; tap < taps_.count(x); ++tap, pixel += channels_) {
                const uint32_t weight = weights[tap];
                red += pixel[0] * weight;
                green += pixel[1] * weight;
                blue += pixel[2] * weight;
            }
            out[3 * x] = to_byte(red);
            out[3 * x + 1] = to_byte(green);
            out[3 * x + 2] = to_byte(blue);
        }
    }

    const Taps& taps_;
    const int channels_;
};

class ScalarVertical final : public VerticalPass {
public:
    explicit ScalarVertical(const Taps& taps) : taps_(taps) {}

    void run(int64_t output, const uint8_t* const* in, int64_t bytes, uint8_t* out) const override {
        constexpr int64_t kChunk = 256;
        const int32_t* weights = taps_.of(output);
        for (int64_t start = 0; start < bytes; start += kChunk) {
            const int64_t length = std::min(kChunk, bytes - start);
            uint32_t sums[kChunk];
            std::fill(sums, sums + length, kHalf);
            for (int64_t tap = 0; tap < taps_.count(output); ++tap)
                for (int64_t i = 0; i < length; ++i) sums[i] += in[tap][start + i] * static_cast<uint32_t>(weights[tap]);
            for (int64_t i = 0; i < length; ++i) out[start + i] = to_byte(sums[i]);
        }
    }

private:
    const Taps& taps_;
};

void scalar_cut(const uint8_t* const* rows, int channels, int64_t columns, uint8_t* out) {
    for (int64_t x = 0; x < columns * kPatchSide; x += kPatchSide)
        for (int c = 0; c < 3; ++c)
            for (int64_t y = 0; y < kPatchSide; ++y)
                for (int64_t i = x; i < x + kPatchSide; ++i) *out++ = rows[y][i * channels + c];
}

template <class Value>
void scalar_convert_to(const uint8_t* bytes, int64_t count, uint8_t* out, const uint8_t* table) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(out + i * sizeof(Value), table + bytes[i] * sizeof(Value), sizeof(Value));
}

void scalar_convert(const uint8_t* bytes, int64_t count, uint8_t* out, const Values& values) {
    const auto to = values.bytes == 4 ? scalar_convert_to<uint32_t> : values.bytes == 2 ? scalar_convert_to<uint16_t> : scalar_convert_to<uint8_t>;
    to(bytes, count, out, values.table);
}

std::vector<const Kernels*> fastest_first() {
    std::vector<const Kernels*> here;
    for (const Kernels* candidate : {
#if defined(__x86_64__)
             &vnni_kernels, &avx2_kernels,
#endif
             &scalar_kernels, &portable_kernels,
         })
        if (candidate->runs_here()) here.push_back(candidate);
    return here;
}

const Kernels* named(const std::string& name, const std::string& who) {
    std::string names;
    for (const Kernels* candidate : fastest_first()) {
        if (candidate->name == name) return candidate;
        names += (names.empty() ? "'" : ", '") + std::string(candidate->name) + "'";
    }
    throw std::invalid_argument(who + " is '" + name + "', expected one that this CPU runs: " + names);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels scalar_kernels{
    "scalar",
    [] { return true; },
    [](const Taps& taps, int channels) -> std::unique_ptr<HorizontalPass> { return std::make_unique<ScalarHorizontal>(taps, channels); },
    [](const Taps& taps) -> std::unique_ptr<VerticalPass> { return std::make_unique<ScalarVertical>(taps); },
    scalar_cut,
    scalar_convert,
    nullptr,
};

const Kernels& kernels() {
    const Kernels* current = chosen.load();
    if (!current) {
        const char* name = std::getenv("IDEFICS2_FAST_SIMD");
        current = name && *name ? named(name, "IDEFICS2_FAST_SIMD") : fastest_first().front();
        chosen.store(current);
    }
    return *current;
}

void use_kernels(const std::string& name) { chosen.store(named(name, "simd")); }

std::vector<std::string> kernels_here() {
    std::vector<std::string> names;
    for (const Kernels* candidate : fastest_first()) names.emplace_back(candidate->name);
    return names;
}

int64_t Taps::most() const {
    int64_t most = 0;
    for (int64_t output = 0; output < outputs(); ++output) most = std::max(most, count(output));
    return most;
}

// Pillow's precompute_coeffs and normalize_coeffs_8bpc. Every operation rounds as it does there: no fused multiply-add, no reordering.
Taps bilinear_taps(int64_t input, int64_t output, int64_t needed) {
    assert(0 < needed && needed <= output && 0 < input);
    Taps taps;
    taps.input = input;
    if (input == output) return taps;
    const double scale = static_cast<double>(input) / static_cast<double>(output);
    const double support = std::max(scale, 1.0);
    const double inverse = 1.0 / support;
    std::vector<double> window;
    for (int64_t x = 0; x < needed; ++x) {
        const double center = (static_cast<double>(x) + 0.5) * scale;
        const int64_t first = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
        const int64_t end = std::min(static_cast<int64_t>(center + support + 0.5), input);
        window.clear();
        double sum = 0.0;
        for (int64_t i = 0; i < end - first; ++i) {
            const double distance = std::abs((static_cast<double>(i + first) - center + 0.5) * inverse);
            window.push_back(distance < 1.0 ? 1.0 - distance : 0.0);
            sum += window.back();
        }
        taps.first.push_back(first);
        taps.begin.push_back(static_cast<int64_t>(taps.weights.size()));
        for (const double weight : window) {
            const double normalised = sum != 0.0 ? weight / sum : weight;
            taps.weights.push_back(static_cast<int32_t>(0.5 + normalised * (1 << kWeightBits)));
        }
    }
    taps.begin.push_back(static_cast<int64_t>(taps.weights.size()));
    return taps;
}

namespace {

// The axes used last, by what they are made from. Long ones are not kept: their tables are large, and time goes elsewhere.
template <class Pass>
class Axes {
public:
    using Key = std::array<int64_t, 5>;  // input, output, needed, channels, kernels
    using Made = std::shared_ptr<const Axis<Pass>>;

    template <class Make>
    Made get(const Key& key, const Make& make) {
        {
            const std::lock_guard lock(mutex_);
            const auto found = std::find_if(kept_.begin(), kept_.end(), [&](const auto& entry) { return entry.first == key; });
            if (found != kept_.end()) {
                kept_.splice(kept_.begin(), kept_, found);
                return found->second;
            }
        }
        Made made = make();
        if (key[0] > kLongest || key[1] > kLongest) return made;
        const std::lock_guard lock(mutex_);
        kept_.emplace_front(key, made);
        if (kept_.size() > kMost) kept_.pop_back();
        return made;
    }

    std::mutex& mutex() { return mutex_; }

private:
    static constexpr size_t kMost = 64;
    static constexpr int64_t kLongest = 10'000;
    std::mutex mutex_;
    std::list<std::pair<Key, Made>> kept_;
};

// Never destroyed: threads may outlive all else. No thread holds a lock while the process forks.
template <class Pass>
Axes<Pass>& axes() {
    static Axes<Pass>* const kept = [] {
        auto* made = new Axes<Pass>;
        const auto lock = [] { axes<Pass>().mutex().lock(); };
        const auto unlock = [] { axes<Pass>().mutex().unlock(); };
        if (pthread_atfork(lock, unlock, unlock) != 0) throw std::runtime_error("pthread_atfork failed");
        return made;
    }();
    return *kept;
}

template <class Pass, class MakePass>
std::shared_ptr<const Axis<Pass>> axis(int64_t input, int64_t output, int64_t needed, int channels, const Kernels& with, const MakePass& make_pass) {
    return axes<Pass>().get({input, output, needed, channels, static_cast<int64_t>(reinterpret_cast<intptr_t>(&with))}, [&] {
        auto made = std::make_shared<Axis<Pass>>();
        made->taps = bilinear_taps(input, output, needed);
        if (!made->taps.identity()) made->pass = make_pass(made->taps);
        return made;
    });
}

}  // namespace

Resampler::Resampler(Size input, Size output, Size needed, int channels, PassOrder order, const Kernels& with)
    : columns_(axis<HorizontalPass>(input.width, output.width, needed.width, channels, with,
                                    [&](const Taps& taps) { return with.horizontal(taps, channels); })),
      rows_(axis<VerticalPass>(input.height, output.height, needed.height, 0, with, with.vertical)),
      needed_(needed) {
    const int64_t fewer_rows = input.height - output.height, fewer_columns = input.width - output.width;
    vertical_first_ = order == PassOrder::shrinking_first && fewer_rows > 0 && fewer_rows > 2 * fewer_columns;
}

void Resampler::run(const Source& source, int64_t first, int64_t last, const RowsSink& sink) const {
    assert(0 <= first && first <= last && last <= needed_.height);
    assert(source.size.height == rows_->taps.input && source.size.width == columns_->taps.input);
    if (first == last) return;
    if (columns_->taps.identity()) {
        run_vertical(source, first, last, sink);
    } else if (rows_->taps.identity() || vertical_first_) {
        run_horizontal_last(source, first, last, sink);
    } else {
        run_horizontal_first(source, first, last, sink);
    }
}

namespace {

// Rows that a thread keeps between two steps. The memory is used again for the next image: new pages cost more than the arithmetic.
class Rows {
public:
    Rows(std::vector<uint8_t>& memory, int64_t count, int64_t bytes) : count_(count), stride_(bytes + kRowPadding) {
        if (memory.size() < static_cast<size_t>(count_ * stride_)) memory.resize(count_ * stride_);
        data_ = memory.data();
    }
    // Any `count` rows in sequence have places of their own.
    uint8_t* operator[](int64_t y) const { return data_ + y % count_ * stride_; }

private:
    uint8_t* data_;
    int64_t count_, stride_;
};

thread_local std::vector<uint8_t> memory_between, memory_after;

// Hands rows on, kPatchSide at a time.
class Strips {
public:
    Strips(const RowsSink& sink, int64_t last, int channels) : sink_(sink), last_(last), channels_(channels) {}

    void add(int64_t y, const uint8_t* row) {
        rows_.push_back(row);
        if (rows_.size() < kPatchSide && y + 1 < last_) return;
        sink_(y + 1 - static_cast<int64_t>(rows_.size()), rows_, channels_);
        rows_.clear();
    }

private:
    const RowsSink& sink_;
    const int64_t last_;
    const int channels_;
    std::vector<const uint8_t*> rows_;
};

// The rows of an output, and after them the last one again, as a vertical pass wants them.
template <class RowAt>
void list_rows(const Taps& taps, int64_t output, std::vector<const uint8_t*>& list, const RowAt& row_at) {
    list.clear();
    for (int64_t y = taps.first[output]; y < taps.end(output); ++y) list.push_back(row_at(y));
    list.insert(list.end(), VerticalPass::kSpareRows, list.back());
}

}  // namespace

void Resampler::run_vertical(const Source& source, int64_t first, int64_t last, const RowsSink& sink) const {
    const int64_t bytes = needed_.width * source.channels;
    const Rows after(memory_after, kPatchSide, bytes);
    Strips strips(sink, last, source.channels);
    std::vector<const uint8_t*> list;
    for (int64_t y = first; y < last; ++y) {
        if (rows_->taps.identity()) {
            strips.add(y, source.row(y));
            continue;
        }
        list_rows(rows_->taps, y, list, [&](int64_t at) { return source.row(at); });
        rows_->pass->run(y, list.data(), bytes, after[y]);
        strips.add(y, after[y]);
    }
}

void Resampler::run_horizontal_last(const Source& source, int64_t first, int64_t last, const RowsSink& sink) const {
    const int block = columns_->pass->block;
    const int64_t source_bytes = source.size.width * source.channels;
    const Rows between(memory_between, block, source_bytes), after(memory_after, block + kPatchSide - 1, needed_.width * 3);
    Strips strips(sink, last, 3);
    std::vector<const uint8_t*> list, in(block);
    std::vector<uint8_t*> out(block);
    for (int64_t start = first; start < last; start += block) {
        for (int64_t i = 0; i < block; ++i) {
            const int64_t y = std::min(start + i, last - 1);
            out[i] = after[y];
            in[i] = rows_->taps.identity() ? source.row(y) : between[y];
            if (rows_->taps.identity() || start + i > y) continue;
            list_rows(rows_->taps, y, list, [&](int64_t at) { return source.row(at); });
            rows_->pass->run(y, list.data(), source_bytes, between[y]);
        }
        columns_->pass->run(in.data(), out.data());
        for (int64_t y = start; y < std::min(start + block, last); ++y) strips.add(y, after[y]);
    }
}

void Resampler::run_horizontal_first(const Source& source, int64_t first, int64_t last, const RowsSink& sink) const {
    const int block = columns_->pass->block;
    const int64_t bytes = needed_.width * 3;
    // A block is made when its first row is wanted, while all rows before it may be in use.
    const Rows between(memory_between, rows_->taps.most() + block, bytes), after(memory_after, kPatchSide, bytes);
    Strips strips(sink, last, 3);
    std::vector<const uint8_t*> list, in(block);
    std::vector<uint8_t*> out(block);
    const int64_t end = rows_->taps.end(last - 1);
    for (int64_t y = first, next = rows_->taps.first[first]; y < last; ++y) {
        for (; next < rows_->taps.end(y); next += block) {
            for (int64_t i = 0; i < block; ++i) {
                const int64_t at = std::min(next + i, end - 1);
                in[i] = source.row(at);
                out[i] = between[at];
            }
            columns_->pass->run(in.data(), out.data());
        }
        list_rows(rows_->taps, y, list, [&](int64_t at) { return between[at]; });
        rows_->pass->run(y, list.data(), bytes, after[y]);
        strips.add(y, after[y]);
    }
}

}  // namespace idefics2
