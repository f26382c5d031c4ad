// Where in a recording does somebody speak?  node speech.mjs SOCKET CLIP.wav
import { readFileSync } from "node:fs";
import { basename } from "node:path";
import { close, infer } from "./edge.mjs";

const WINDOW = 512, CONTEXT = 64;
const [socketPath, clip] = process.argv.slice(2);
const file = readFileSync(clip);
if (file.toString("latin1", 0, 4) !== "RIFF") throw new Error(`${clip} is not a WAV file`);
const recorded = new Int16Array(file.buffer.slice(file.byteOffset + 44, file.byteOffset + file.length - (file.length % 2)));
const samples = new Float32Array(CONTEXT + recorded.length);
recorded.forEach((sample, i) => (samples[CONTEXT + i] = sample / 32768));

let state = new Float32Array(256), speaking = 0, windows = 0;
for (let start = 0; start + CONTEXT + WINDOW <= samples.length; start += WINDOW) {
  const { output, stateN } = await infer(socketPath, "vad", [
    { name: "input", datatype: "FP32", shape: [1, CONTEXT + WINDOW], data: samples.subarray(start, start + CONTEXT + WINDOW) },
    { name: "state", datatype: "FP32", shape: [2, 1, 128], data: state },
    { name: "sr", datatype: "INT64", shape: [], data: BigInt64Array.of(16000n) },
  ]);
  state = stateN;
  speaking += output[0] > 0.5;
  windows++;
}
console.log(`${basename(clip)}: speech in ${speaking} of ${windows} windows of 32 ms`);
close();
