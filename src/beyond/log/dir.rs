//! A folder on a real disk, which one process has at a time.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::files::{Files, disk_failed};

/// What a disk that fails answers to a write.
const EIO: i32 = 5;

/// A folder that is locked until this is dropped.
pub(crate) struct Dir {
    path: PathBuf,
    folder: File,
    open: Option<(String, File)>, // the file that was last written to
}

impl Dir {
    /// Makes the folder if it is not there, and locks it.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let made = path.ancestors().take_while(|path| !path.exists()).count();
        fs::create_dir_all(path)?;
        for parent in path.ancestors().skip(1).take(made.max(1)) {
            sync_folder(parent)?;
        }
        let (path, folder) = (path.to_owned(), File::open(path)?);
        flock(&folder, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            match error.into() {
                error if io::Error::kind(&error) == io::ErrorKind::WouldBlock => {
                    io::Error::other("another process has this folder")
                }
                error => error,
            }
        })?;
        let open = None;
        Ok(Dir { path, folder, open })
    }

    fn file(&mut self, name: &str) -> io::Result<&File> {
        if self.open.as_ref().is_none_or(|(open, _)| open != name) {
            let mut options = OpenOptions::new();
            let file = options
                .create(true)
                .truncate(false)
                .write(true)
                .open(self.path.join(name))?;
            self.open = Some((name.to_owned(), file));
        }
        let (_, file) = self.open.as_ref().ok_or(io::ErrorKind::NotFound)?;
        Ok(file)
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    File::open(path)?.sync_all()
}

impl Files for Dir {
    fn list(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.path)?;
        let names = names.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect()
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        fs::read(self.path.join(name))
    }

    fn write(&mut self, name: &str, at: usize, bytes: &[u8]) -> io::Result<()> {
        let written = self.file(name)?.write_all_at(bytes, at as u64);
        written.map_err(|error| match error.raw_os_error() {
            Some(EIO) => disk_failed(error),
            _ => error, // full, or a file that another program took away
        })
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        self.file(name)?.sync_data().map_err(disk_failed)
    }

    fn sync_names(&mut self) -> io::Result<()> {
        self.folder.sync_all().map_err(disk_failed)
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        self.open = None;
        fs::rename(self.path.join(from), self.path.join(to))
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        self.open = None;
        fs::remove_file(self.path.join(name))
    }

    fn put_aside(&mut self) -> io::Result<String> {
        let aside = |nth: u32| {
            let more = if nth == 0 {
                String::new()
            } else {
                format!("-{nth}")
            };
            let mut aside = self.path.clone().into_os_string();
            aside.push(format!(".suspect{more}"));
            PathBuf::from(aside)
        };
        let free = (0..1000).map(aside).find(|path| !path.exists());
        let aside = free.ok_or(io::ErrorKind::AlreadyExists)?;
        fs::rename(&self.path, &aside)?;
        sync_folder(self.path.parent().unwrap_or(Path::new(".")))?;
        Ok(aside.display().to_string())
    }
}
