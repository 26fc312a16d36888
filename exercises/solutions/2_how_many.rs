//! Of more than `copies` in all, one is counted twice: that is where they meet. With three copies
//! (2, 2) is the only pair that does both.

pub fn always_meet(copies: u32, write: u32, read: u32) -> bool {
    write + read > copies
}

pub fn survive_one(copies: u32, write: u32, read: u32) -> bool {
    write.max(read) < copies
}
