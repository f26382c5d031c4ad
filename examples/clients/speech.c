/* Where in a recording does somebody speak?  speech SOCKET CLIP.wav    Build: gcc -O2 -o speech speech.c */
#define _GNU_SOURCE
#include "edge.h"

enum { WINDOW = 512, CONTEXT = 64, STATE = 256 };

static const char *REQUEST =
    "{\"inputs\":[{\"name\":\"input\",\"datatype\":\"FP32\",\"shape\":[1,576],\"parameters\":{\"binary_data_size\":2304}},"
    "{\"name\":\"state\",\"datatype\":\"FP32\",\"shape\":[2,1,128],\"parameters\":{\"binary_data_size\":1024}},"
    "{\"name\":\"sr\",\"datatype\":\"INT64\",\"shape\":[],\"parameters\":{\"binary_data_size\":8}}],"
    "\"outputs\":[{\"name\":\"output\"},{\"name\":\"stateN\"}],\"parameters\":{\"binary_data_output\":true}}";

int main(int count, char **words) {
  if (count != 3) {
    fprintf(stderr, "usage: %s SOCKET CLIP.wav\n", words[0]);
    return 2;
  }
  FILE *file = fopen(words[2], "rb");
  char header[44];
  if (file == NULL || fread(header, 1, sizeof header, file) != sizeof header || memcmp(header, "RIFF", 4) != 0) {
    fprintf(stderr, "%s is not a WAV file\n", words[2]);
    return 1;
  }
  int fd = edge_connect(words[1]), speaking = 0, windows = 0;
  struct {
    float heard[CONTEXT + WINDOW], state[STATE];
    int64_t rate;
  } input = {.rate = 16000};
  struct {
    float speech, state[STATE];
  } output;
  int16_t samples[WINDOW];
  while (fread(samples, sizeof *samples, WINDOW, file) == WINDOW) {
    for (int i = 0; i < WINDOW; i++) input.heard[CONTEXT + i] = (float)samples[i] / 32768;
    edge_infer(fd, "vad", REQUEST, &input, sizeof input, &output, sizeof output);
    memcpy(input.state, output.state, sizeof input.state);
    memmove(input.heard, input.heard + WINDOW, CONTEXT * sizeof(float));
    speaking += output.speech > 0.5f;
    windows++;
  }
  printf("%s: speech in %d of %d windows of 32 ms\n", basename(words[2]), speaking, windows);
  return 0;
}
