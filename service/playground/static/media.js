/** Pictures and clips as the browser has them: what kind they are, frames of them, and copies of other bytes. */

export function kindOf(file) {
  const name = file.name ?? "";
  const video = file.type.startsWith("video/") || /\.(mkv|avi|mov|mp4|webm)$/i.test(name);
  return video || isGif(file) ? "video" : "image";
}

export function isGif(file) {
  return file.type === "image/gif";
}

/**
 * The same picture or clip in other bytes: a worker keeps what it has encoded by the hash of the file.
 *
 * Sixteen random bytes go behind the end, in clothes that the container's readers skip.
 */
export async function freshCopy(file) {
  const head = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  const tag = (from) => String.fromCharCode(...head.slice(from, from + 4));
  const noise = crypto.getRandomValues(new Uint8Array(16));
  const ascii = (text) => [...text].map((letter) => letter.charCodeAt(0));
  let clothes = [];
  if (tag(4) === "ftyp") clothes = [0, 0, 0, 24, ...ascii("free")];
  else if (head[0] === 0x1a && head[1] === 0x45) clothes = [0xec, 0x90]; // Matroska's Void
  else if (tag(0) === "RIFF") clothes = [...ascii("JUNK"), 16, 0, 0, 0];
  return new Blob([file, new Uint8Array(clothes), noise], { type: file.type });
}

/** Draws the frames of `file` at `times` (seconds); null for those that this browser cannot decode. */
export async function framesAt(file, url, times) {
  try {
    return isGif(file) ? await framesOfGif(file, times) : await framesOfVideo(url, times);
  } catch {
    return times.map(() => null);
  }
}

async function framesOfVideo(url, times) {
  const video = Object.assign(document.createElement("video"), { muted: true, preload: "auto", src: url });
  await happened(video, "loadeddata");
  const frames = [];
  for (const time of times) {
    const seeked = happened(video, "seeked");
    video.currentTime = Math.min(time, Math.max(0, video.duration - 0.01));
    await seeked;
    frames.push(drawn(video, video.videoWidth, video.videoHeight));
  }
  return frames;
}

async function framesOfGif(file, times) {
  const decoder = new ImageDecoder({ data: await file.arrayBuffer(), type: file.type });
  await decoder.tracks.ready;
  const frames = [];
  for (let index = 0; index < decoder.tracks.selectedTrack.frameCount; index += 1) {
    const { image } = await decoder.decode({ frameIndex: index });
    const [canvas, start] = [drawn(image, image.displayWidth, image.displayHeight), image.timestamp / 1e6];
    frames.push({ canvas, start });
    image.close();
  }
  return times.map((time) => (frames.findLast((frame) => frame.start <= time + 1e-3) ?? frames[0]).canvas);
}

const FRAME_WIDTH = 480;

function drawn(source, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.min(width, FRAME_WIDTH);
  canvas.height = Math.round((canvas.width * height) / width);
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function happened(video, event) {
  return new Promise((resolve, reject) => {
    video.addEventListener(event, resolve, { once: true });
    video.addEventListener("error", reject, { once: true });
    setTimeout(reject, 10_000);
  });
}
