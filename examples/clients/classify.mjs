// Which digit does a picture show?  node classify.mjs SOCKET PICTURE.pgm
import { readFileSync } from "node:fs";
import { basename } from "node:path";
import { close, infer } from "./edge.mjs";

const [socketPath, picture] = process.argv.slice(2);
const file = readFileSync(picture);
const header = /^P5\s+(\d+)\s+(\d+)\s+(\d+)\s/.exec(file.toString("latin1"));
if (!header) throw new Error(`${picture} is not a binary PGM`);
const [width, height, white] = header.slice(1).map(Number);
const data = Float32Array.from(file.subarray(header[0].length, header[0].length + width * height), (pixel) => pixel / white);

const { probs } = await infer(socketPath, "digits", [{ name: "image", datatype: "FP32", shape: [1, 1, height, width], data }]);
const best = probs.indexOf(Math.max(...probs));
console.log(`${basename(picture)} shows a ${best} (${(probs[best] * 100).toFixed(0)}%)`);
close();
