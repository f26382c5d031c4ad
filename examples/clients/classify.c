/* Which digit does a picture show?  classify SOCKET PICTURE.pgm    Build: gcc -O2 -o classify classify.c */
#define _GNU_SOURCE
#include "edge.h"

int main(int count, char **words) {
  if (count != 3) {
    fprintf(stderr, "usage: %s SOCKET PICTURE.pgm\n", words[0]);
    return 2;
  }
  FILE *file = fopen(words[2], "rb");
  int width, height, white;
  unsigned char pixels[64];
  if (file == NULL || fscanf(file, "P5 %d %d %d", &width, &height, &white) != 3 || width != 8 || height != 8 || white < 1 ||
      fgetc(file) == EOF || fread(pixels, 1, sizeof pixels, file) != sizeof pixels) {
    fprintf(stderr, "%s is not a binary PGM of 8 x 8 pixels\n", words[2]);
    return 1;
  }
  fclose(file);

  float image[64], probabilities[10];
  for (int i = 0; i < 64; i++) image[i] = (float)pixels[i] / (float)white;
  edge_infer(edge_connect(words[1]), "digits",
             "{\"inputs\":[{\"name\":\"image\",\"datatype\":\"FP32\",\"shape\":[1,1,8,8],\"parameters\":{\"binary_data_size\":256}}],"
             "\"parameters\":{\"binary_data_output\":true}}",
             image, sizeof image, probabilities, sizeof probabilities);

  int best = 0;
  for (int i = 1; i < 10; i++)
    if (probabilities[i] > probabilities[best]) best = i;
  printf("%s shows a %d (%.0f%%)\n", basename(words[2]), best, (double)probabilities[best] * 100);
  return 0;
}
