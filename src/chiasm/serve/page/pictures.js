// Pictures of a message: from files, the clipboard, a drop, the camera.

const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const LARGEST = 8 * 1024 * 1024; // bytes; larger ones, and other formats, are drawn again as JPEG
const LONGEST_SIDE = 2560;

/** {url, name, width, height} of a file. Throws an Error with a text for the user. */
export async function fromFile(file) {
  const url = await asDataUrl(file);
  const image = await decoded(url, file.name);
  const { naturalWidth: width, naturalHeight: height } = image;
  if (SENT_AS_THEY_ARE.includes(file.type) && file.size <= LARGEST) return { url, name: file.name, width, height };
  return { ...drawn(image, width, height), name: file.name };
}

/** What a video element shows now. */
export function fromVideo(video) {
  return { ...drawn(video, video.videoWidth, video.videoHeight), name: "camera.jpg" };
}

/** The pictures among dropped or pasted things. */
export function filesOf(transfer) {
  const files = [...(transfer?.files || [])];
  for (const item of transfer?.items || []) {
    const file = files.length ? null : item.kind === "file" && item.getAsFile();
    if (file) files.push(file);
  }
  return files.filter((file) => file.type.startsWith("image/"));
}

function drawn(source, width, height) {
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const brush = canvas.getContext("2d");
  brush.fillStyle = "#fff";
  brush.fillRect(0, 0, canvas.width, canvas.height);
  brush.drawImage(source, 0, 0, canvas.width, canvas.height);
  return { url: canvas.toDataURL("image/jpeg", 0.92), width: canvas.width, height: canvas.height };
}

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

function decoded(url, name) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error(`${name} is not a picture that this browser can show`));
    image.src = url;
  });
}
