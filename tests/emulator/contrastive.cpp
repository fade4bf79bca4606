// Runs the cases of one file through the passes of the contrastive losses for "sm_80" or "sm_90a", each under three
// orders of threads, which have to give the same bits, and writes what they left to another. test_contrastive.py knows
// both files.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "cuda/contrastive/call.h"
#include "cuda/contrastive/device.h"
#include "emulator/emulator.h"

using namespace mmk;
using namespace mmk::cuda;

struct Place {  // of a matrix: `offset` numbers after an address that is a multiple of 16
    int64_t extent, offset, stride;
};
struct Header {
    int64_t siglip, with_gradients, bfloat16, images, texts, width, offset, first, last, same;
    Place image, text;
    int64_t ds_stride, chunk;  // rows of ds at a time
    int64_t workspace_bytes;   // of the statistics; 0: as many as they ask for
    double scale, bias, label_smoothing, row_share, column_share, count;
    double products[2];
};

static const char* case_name = "";
static int failures = 0;

static void fail(const std::string& why) {
    failures++;
    printf("FAILED %s: %s\n", case_name, why.c_str());
}

// Exactly as large as its matrix, so that the sanitizers see what lies beyond.
static std::vector<uint16_t> read_matrix(FILE* file, const Place& place) {
    std::vector<uint16_t> numbers(static_cast<size_t>(place.offset + place.extent));
    const auto size = static_cast<size_t>(place.extent);
    if (fread(numbers.data() + place.offset, sizeof(uint16_t), size, file) != size) {
        printf("FAILED: the file of cases ends early\n");
        exit(1);
    }
    return numbers;
}

// Ids of images and texts, and of how many positives each is; empty without.
struct Ids {
    std::vector<int32_t> image, text, image_counts, text_counts;

    Ids(FILE* file, const Header& h) {
        const auto same = static_cast<Same>(h.same);
        if (same == Same::kNothing) return;
        read(image, file, h.images);
        read(text, file, h.texts);
        if (same != Same::kPositive) return;
        read(image_counts, file, h.images);
        read(text_counts, file, h.texts);
    }

  private:
    static void read(std::vector<int32_t>& numbers, FILE* file, int64_t count) {
        numbers.resize(static_cast<size_t>(count));
        if (fread(numbers.data(), sizeof(int32_t), numbers.size(), file) == numbers.size()) return;
        printf("FAILED: the file of cases ends early\n");
        exit(1);
    }
};

template <class T>
static void watch(const std::vector<T>& numbers, bool initialised) {
    emulator::watch(numbers.data(), numbers.size() * sizeof(T), initialised);
}

// The passes of an architecture, for what it serves.
struct Passes {
    bool (*serves)(const Pairs&);
    Error (*clip_statistics)(const ClipStatistics&, cudaStream_t);
    Error (*clip_gradient)(const ClipGradient&, cudaStream_t);
    Error (*siglip)(const LogitRows&, cudaStream_t);
};

// What one run of a case leaves.
struct Results {
    explicit Results(const Header& h)
        : ds(static_cast<size_t>(h.with_gradients ? h.images * h.ds_stride : 0), 0xFFFF), means(4, -1.0f) {}
    bool operator==(const Results& other) const {
        return ds == other.ds && memcmp(means.data(), other.means.data(), means.size() * sizeof(float)) == 0;
    }

    std::vector<uint16_t> ds;
    std::vector<float> means;  // CLIP: loss, d scale; SigLIP: loss, d scale, d bias
};

static Error run_passes(const Passes& passes, const Header& h, const Pairs& pairs, Results& results) {
    const auto images = static_cast<size_t>(h.images), texts = static_cast<size_t>(h.texts);
    const bool by_ids = pairs.same == Same::kPositive;
    const size_t planes = by_ids ? 4 : 3;
    std::vector<float> rows(planes * images), columns(planes * texts), own(by_ids ? 0 : images);
    std::vector<double> totals(3);
    for (const auto* made : {&rows, &columns, &own, &results.means}) watch(*made, false);
    const std::vector<double> shares{h.row_share, h.column_share, h.count};
    watch(shares, true);
    watch(results.ds, false);
    watch(totals, false);
    const auto smoothing = static_cast<float>(h.label_smoothing);
    const auto row_share = static_cast<float>(by_ids ? 0 : h.row_share);  // by ids the device alone knows it
    const auto column_share = static_cast<float>(by_ids ? 0 : h.column_share);
    if (!h.siglip) {
        const size_t bytes =
            h.workspace_bytes != 0 ? static_cast<size_t>(h.workspace_bytes) : clip_statistics_workspace(pairs);
        std::vector<char> workspace(bytes);
        watch(workspace, false);
        const ClipStatistics statistics{pairs, rows.data(), columns.data(), false, workspace.data(), bytes};
        if (Error error = passes.clip_statistics(statistics, nullptr)) return error;
        const ClipWeights weights{pairs,
                                  smoothing,
                                  row_share,
                                  column_share,
                                  h.count,
                                  by_ids ? shares.data() : nullptr,
                                  smoothing != 0 ? h.products : nullptr,
                                  rows.data(),
                                  columns.data(),
                                  own.data(),
                                  results.means.data()};
        if (Error error = clip_weights(weights, nullptr)) return error;
    }
    if (!h.siglip && !h.with_gradients) return {};
    for (int64_t row0 = 0, chunk; row0 < h.images || row0 == 0; row0 += std::max<int64_t>(chunk, 1)) {
        chunk = std::min(h.images - row0, h.chunk);
        for (const int64_t edge : {h.first, h.last}) {
            if (!by_ids && row0 < edge) chunk = std::min(chunk, edge - row0);
        }
        std::vector<char> workspace(gradient_workspace(pairs.texts, static_cast<int>(chunk)));
        watch(workspace, false);
        uint16_t* const ds = h.with_gradients ? results.ds.data() + row0 * h.ds_stride : nullptr;
        const LogitRows to{pairs,
                           static_cast<int>(row0),
                           static_cast<int>(chunk),
                           ds,
                           h.ds_stride,
                           h.count,
                           totals.data(),
                           results.means.data() + (h.siglip ? 0 : 1),
                           workspace.data(),
                           workspace.size()};
        const ClipGradient clip{to, rows.data(), columns.data(), own.data()};
        if (Error error = h.siglip ? passes.siglip(to, nullptr) : passes.clip_gradient(clip, nullptr)) {
            return error;
        }
    }
    return {};
}

// In each block of a cluster, Hopper's first warpgroup is three steps ahead of the second when that begins a tile of
// more than four steps of 64. The third one copies.
static bool take_turns(const std::vector<int>& commits, int64_t width) {
    const int64_t steps = (width + 63) / 64;
    int64_t done[2][2] = {};
    for (const int warpgroup : commits) {
        int64_t (&of_block)[2] = done[warpgroup / 3];
        const int group = warpgroup % 3;
        if (steps > 4 && group == 1 && of_block[1] % steps == 0 && of_block[0] < of_block[1] + 3) return false;
        of_block[group]++;
    }
    return done[0][0] == done[0][1] && done[1][0] == done[1][1] && done[0][0] == done[1][0];
}

static void run_case(const Passes& passes, FILE* from, FILE* to, const Header& h) {
    const auto image = read_matrix(from, h.image), text = read_matrix(from, h.text);
    const Ids ids(from, h);
    const auto given = [](const std::vector<int32_t>& x) { return x.empty() ? nullptr : x.data(); };
    const std::vector<float> scale(1, static_cast<float>(h.scale)), bias(1, static_cast<float>(h.bias));
    const Pairs pairs{{image.data() + h.image.offset, h.image.stride},
                      {text.data() + h.text.offset, h.text.stride},
                      scale.data(),
                      h.siglip ? bias.data() : nullptr,
                      static_cast<int>(h.images),
                      static_cast<int>(h.texts),
                      static_cast<int>(h.width),
                      h.bfloat16 != 0,
                      static_cast<int>(h.offset),
                      static_cast<int>(h.first),
                      static_cast<int>(h.last),
                      static_cast<Same>(h.same),
                      given(ids.image),
                      given(ids.text),
                      given(ids.image_counts),
                      given(ids.text_counts)};
    if (!passes.serves(pairs)) return fail("is not served");
    std::vector<Results> all;
    for (const auto order : {emulator::Order::kLowestFirst, emulator::Order::kHighestFirst, emulator::Order::kRandom}) {
        emulator::options() = {order, 1};
        all.emplace_back(h);
        for (const auto* x : {&image, &text}) watch(*x, true);
        for (const auto* x : {&scale, &bias}) watch(*x, true);
        for (const auto* x : {&ids.image, &ids.text, &ids.image_counts, &ids.text_counts}) watch(*x, true);
        emulator::counters().wgmma_commits.clear();
        try {
            if (const Error error = run_passes(passes, h, pairs, all.back())) fail(error.message());
        } catch (const emulator::Error& error) {
            fail(error.what());
        }
        if (!take_turns(emulator::counters().wgmma_commits, h.width)) fail("its warpgroups do not take turns");
        emulator::forget_watched();
        if (!(all.back() == all.front())) fail("depends on the order of threads");
    }
    fwrite(all[0].means.data(), sizeof(float), all[0].means.size(), to);
    fwrite(all[0].ds.data(), sizeof(uint16_t), all[0].ds.size(), to);
}

// Every tile has its turn, of more rows than a group has, too.
static void check_grouped_tiles() {
    for (int rows = 1; rows < 9; rows++) {
        for (int columns = 1; columns < 5; columns++) {
            std::set<std::pair<int, int>> seen;
            for (int i = 0; i < rows * columns; i++) {
                const TileAt at = grouped_tile<3>(i, rows, columns);
                if (at.row >= 0 && at.row < rows && at.column >= 0 && at.column < columns) {
                    seen.insert({at.row, at.column});
                }
            }
            if (seen.size() != static_cast<size_t>(rows) * columns) fail("leaves out tiles");
        }
    }
}

int main(int, char** arguments) {
    check_grouped_tiles();
    const bool hopper = arguments[1] == std::string("sm_90a");
    const Passes passes = hopper
                              ? Passes{contrastive_sm90_serves, clip_statistics_sm90, clip_gradient_sm90, siglip_sm90}
                              : Passes{[](const Pairs&) { return true; }, clip_statistics, clip_gradient, siglip};
    FILE *const from = fopen(arguments[2], "rb"), *const to = fopen(arguments[3], "wb");
    emulator::counters() = {};
    Header header;
    std::string name;
    for (int number = 0; fread(&header, sizeof header, 1, from) == 1; number++) {
        name = "case " + std::to_string(number);
        case_name = name.c_str();
        run_case(passes, from, to, header);
    }
    fclose(to);
    if (emulator::counters().bank_conflicts != 0) fail("has bank conflicts");
    if (failures == 0) printf("right\n");
    return failures != 0;
}
