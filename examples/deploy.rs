//! Remote deployment: `deploy put FILE`, `deploy agent DIRECTORY COMMAND…` on each host, `deploy status`;
//! `docs/programs.md` has more.
//!
//! An agent writes a new version beside the file that is there, renames it, runs the command that it was started with,
//! and reports. What comes from the ring is written into that one file or printed: none of it is run or names a file.

use kv54::beyond::programs::{Failed, again, client, host, say, text, words};
use kv54::{client::Client, entry::Packed, error::plain};
use std::{fs, path::Path, process::Command, time::Duration};

/// Has the newest version run here, unless it was reported that it has, and noted beside the file which one that was.
async fn update(client: &Client, folder: &Path, command: &mut Command) -> Result<(), Failed> {
    let (new, seen, own) = (folder.join("new"), folder.join("seen"), host() + " ");
    let now = client.get(b"deploy").await?;
    let done = format!("{own}{} ", now.value()?[0]);
    let told = text(&client.get(b"deploy:hosts").await?);
    let is_told = told.lines().any(|told| told.starts_with(&done));
    if now.is_nil() || is_told && fs::read(&seen).is_ok_and(|seen| seen == *now) {
        return Ok(());
    }
    let (version, bytes) = client.get_large(b"deploy").await?.ok_or("there is none")?;
    fs::write(&new, bytes)?;
    fs::File::open(&new)?.sync_all()?; // or a power cut could leave a part of it
    fs::rename(&new, folder.join("current"))?;
    fs::write(&seen, &*client.get(b"deploy").await?)?; // where that is newer, it is not reported yet
    fs::File::open(folder)?.sync_all()?; // or the old one, after this has reported the new one
    let state = match command.status() {
        Ok(status) if status.success() => "ok".to_owned(),
        Ok(status) => format!("failed: {status}"),
        Err(error) => format!("failed: {error}"),
    };
    let told = format!("{own}{version} {state}");
    let with_it = |old: &Packed| {
        let old = text(old);
        let others = old.lines().filter(|told| !told.starts_with(&own));
        let told = others.chain([&*told]).collect::<Vec<_>>().join("\n");
        Some(Packed::of(told))
    };
    again(async || client.swap(b"deploy:hosts", with_it).await).await?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failed> {
    let (client, words) = (client()?, words());
    match &words.iter().map(|word| &**word).collect::<Vec<_>>()[..] {
        ["put", file] => {
            let version = client.set_large(b"deploy", &fs::read(file)?).await?;
            say(format!("version {version}\n"))?;
        }
        ["agent", folder, program, args @ ..] => loop {
            let updated = update(&client, folder.as_ref(), Command::new(program).args(args)).await;
            updated.unwrap_or_else(|error| eprintln!("deploy: {error:?}"));
            tokio::time::sleep(Duration::from_secs(1)).await;
        },
        ["status"] => {
            let told = text(&client.get(b"deploy:hosts").await?);
            told.lines().try_for_each(|told| say(plain(told) + "\n"))?;
        }
        _ => return Err("deploy put FILE, deploy agent DIRECTORY COMMAND, deploy status".into()),
    }
    Ok(())
}
