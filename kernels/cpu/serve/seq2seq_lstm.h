/* An LSTM stack, with a linear head if it was exported with one, as plain C. One handle holds the weights, packed for this
 * machine, and the state of `batch` streams. Nothing is allocated and nothing can fail after seq2seq_lstm_create. Handles
 * are independent: use one in each thread. Numbers are float32. */
#ifndef SEQ2SEQ_LSTM_H
#define SEQ2SEQ_LSTM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct seq2seq_lstm seq2seq_lstm;

/* Reads weights.bin and packs it; the state is zero. NULL on failure, and then `message` (if not NULL) says why. */
seq2seq_lstm* seq2seq_lstm_create(const char* weights, int64_t batch, char* message, size_t message_size);

/* Numbers of a row of input and of output. */
int64_t seq2seq_lstm_input_size(const seq2seq_lstm* lstm);
int64_t seq2seq_lstm_output_size(const seq2seq_lstm* lstm);

/* The instructions that multiply, such as "avx512-fma", "avx512-sums", "avx512-vnni" or "avx2-int8". */
const char* seq2seq_lstm_instructions(const seq2seq_lstm* lstm);

/* Sets the state of all streams to zero. */
void seq2seq_lstm_reset(seq2seq_lstm* lstm);

/* One step of every stream, from the state that the call before left: x (batch, input) to y (batch, output). */
void seq2seq_lstm_step(seq2seq_lstm* lstm, const float* x, float* y);

/* Steps of every stream: x (batch, steps, input) to y (batch, steps, output). */
void seq2seq_lstm_run(seq2seq_lstm* lstm, int64_t steps, const float* x, float* y);

void seq2seq_lstm_destroy(seq2seq_lstm* lstm);

#ifdef __cplusplus
}
#endif
#endif
