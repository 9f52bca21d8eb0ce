/* Streams numbers from standard input through the exported LSTM: one line of output a step, and the time of a step on
 * standard error. Usage: example weights.bin < numbers. This is C99 and C++17 alike: cc or c++ compiles it. */
#define _POSIX_C_SOURCE 199309L
#include "seq2seq_lstm.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

int main(int count, char** arguments) {
    char message[256];
    seq2seq_lstm* lstm = seq2seq_lstm_create(count > 1 ? arguments[1] : "weights.bin", 1, message, sizeof message);
    if (!lstm) {
        fprintf(stderr, "error: %s\n", message);
        return 2;
    }
    const int64_t input = seq2seq_lstm_input_size(lstm), output = seq2seq_lstm_output_size(lstm);
    float* x = (float*)malloc(input * sizeof *x); /* C++ wants the casts */
    float* y = (float*)malloc(output * sizeof *y);
    if (!x || !y) return 2;
    double seconds = 0;
    long steps = 0;
    for (;; ++steps) {
        for (int64_t i = 0; i < input; ++i)
            if (scanf("%f", x + i) != 1) goto end;
        struct timespec start, stop;
        clock_gettime(CLOCK_MONOTONIC, &start);
        seq2seq_lstm_step(lstm, x, y);
        clock_gettime(CLOCK_MONOTONIC, &stop);
        seconds += (double)(stop.tv_sec - start.tv_sec) + 1e-9 * (double)(stop.tv_nsec - start.tv_nsec);
        for (int64_t i = 0; i < output; ++i) printf("%.9g%c", y[i], i + 1 < output ? ' ' : '\n');
    }
end:
    fprintf(stderr, "%ld steps by %s, %.3f us each\n", steps, seq2seq_lstm_instructions(lstm),
            steps ? 1e6 * seconds / (double)steps : 0.0);
    free(x);
    free(y);
    seq2seq_lstm_destroy(lstm);
    return 0;
}
