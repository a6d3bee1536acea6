// What each drive is told by the file that $SCENE names (see ../scene.py).
import { readFileSync } from "node:fs";

const scene = JSON.parse(readFileSync(process.env.SCENE, "utf8"));
export const baseURL = `${scene.server}/v1`;
export const apiKey = "any";
export const model = "lookonce";
export const images = scene.images;
export const question = scene.question;
export const file = Buffer.from(images.data.split(",")[1], "base64");

export function check(what, said) {
  if (!said?.toLowerCase().includes(scene.answer)) throw new Error(`${what}: ${said} is not ${scene.answer}`);
  console.log(`${what}: ${said.trim()}`);
}

export function held(what, value) {
  if (typeof value?.kind !== "string" || !Number.isInteger(value?.sides)) throw new Error(`${what}: ${JSON.stringify(value)}`);
  console.log(`${what}: ${JSON.stringify(value)}`);
}

export async function refused(what, call, ...words) {
  let error;
  try {
    await call();
  } catch (caught) {
    error = caught;
  }
  const text = `${error?.message} ${error?.responseBody ?? ""}`;
  for (const word of words) if (!text.includes(word)) throw new Error(`${what}: ${error} does not say ${word}`);
  console.log(`${what}: refused, ${error.name}`);
}
